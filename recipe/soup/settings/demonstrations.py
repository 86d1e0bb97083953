"""`algorithm.soup.demonstrations`: for `source=dataset`, where demonstrations stand and in which groups they count."""

from typing import ClassVar, Literal

from recipe.soup.settings.group import Group, Whole, key


class DemonstrationSettings(Group):
    """Of which column, and when. How many there are in a group says `mixed_share`."""

    path: ClassVar[str] = "algorithm.soup.demonstrations"

    column: str = key(
        "target",
        "Column of the training data that holds each prompt's demonstrations: a text, a message of the assistant, or a "
        "list of either; with a dot a field of a mapping.",
        origin="LUFFY's name; UFT has `hint`, RLEP `reward_model.candidates`",
        when="Rows may have none: their prompts are then trained on as with GRPO.",
    )
    list: Literal["candidates", "steps"] = key(
        "candidates",
        "What a list in the column is: demonstrations to choose from (`candidates`), or one of them in pieces that are "
        "joined (`steps`).",
        origin="`candidates`: RLEP; `steps`: UFT",
    )
    gate: Literal["always", "unsolved", "successes"] = key(
        "always",
        "In which groups demonstrations count, by this step's samples without one: in all (`always`), beside samples "
        "of which none has a reward above 0 (`unsolved`), or alone where at most `gate_successes` have one "
        "(`successes`). Elsewhere samples with a demonstration are left out of loss and baseline.",
        origin="`always`: LUFFY; `successes`: HPT",
        when="The batch keeps its size, and samples that are left out were still sampled. For HPT give `rollout.n` one "
        "more sample than the group shall have.",
    )
    gate_successes: Whole = key(
        0,
        "Of `gate=successes`: with more successes than this a group is trained on without its demonstrations.",
        origin="HPT: 0 for Qwen models, 2 for Llama",
        ge=0,
        advice="counts samples; use 0 or more.",
    )
