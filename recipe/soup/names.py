"""Names that verl's registries, configs and fields know us by."""

AGENT_NAME = "soup_agent"
TOOL_AGENT_NAME = "soup_tool_agent"
"""Of the agent loops: one turn, and several with tools between them."""
OURS_FOR = {"single_turn_agent": AGENT_NAME, "tool_agent": TOOL_AGENT_NAME}
"""By verl's name of an agent loop, ours that does the same with prefixes."""
TRAINER_MODE = "soup"
ASYNC_TRAINER_MODE = "soup_colocate_async"
SEPARATE_TRAINER_MODE = "soup_separate_async"
ASYNC_TRAINER_MODES = (ASYNC_TRAINER_MODE, SEPARATE_TRAINER_MODE)
TRAINER_MODES = (TRAINER_MODE, *ASYNC_TRAINER_MODES)
"""Values of `trainer.v1.trainer_mode`."""
REQUESTS_KEY = "soup_requests"
"""Field of a prompt: what its samples continue, and which prefixes they sample for later prompts."""
VISIT_KEY = "soup_visit"
"""Field of a prompt: its place in the order of training, and its fingerprint."""
SAMPLED_KEY = "soup_sampled"
"""In `extra_fields` of a sample: the prefixes that it leaves for later steps."""
