"""What verl lacks and any recipe could use. Nothing in this package knows of SOUP.

Recipes hook in through the entry-point groups `verl_ext.configs` and `verl_ext.registrations` (see setup.py). `plugin/`
is what verl and Hydra load at start, with `config/` as its Hydra groups; `cpu/` is the platform for machines without an
accelerator; `terminal/` shows a run's progress; `historical_policy/` serves past weights. The single files are what a
trainer takes one by one: `health.py` (is every process there and alive?), `failures.py` (why were samples lost?),
`vllm_worker.py` (the class that vLLM loads in its workers), `weight_arrivals.py` (did new weights reach them?),
`weight_sockets.py` (and those of this run?), `padded_batches.py` (how large are micro-batches with their padding?),
`logits_in_pieces.py` (log-probs without flash-attn's kernel), `versioned_client.py` (which version sampled which
token?) and `policy_losses.py` (two losses that verl has no name for); and what is asked before or after a run:
`placement.py` (are there the CPUs and GPUs that verl asks for?), `socket_paths.py` (do Ray's sockets fit?) and
`causes.py` (why did it fail?).
"""

__version__ = "0.1.0"
