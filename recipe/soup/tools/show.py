"""`soup-verl show`: print a run's training samples in the terminal, history and turns in colours of their own."""

import argparse
import io
import re
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.soup.errors import refuse
from recipe.soup.records.json_lines import NUMBER, dumps, read_json_lines
from recipe.soup.records.marks import CLOSE, OPEN, SHOWN_CLOSE, SHOWN_OPEN, TOOL_CLOSE, TOOL_OPEN, printable
from recipe.soup.tools.outputs import check_file

EXAMPLES = r"""examples:
  soup-verl show runs/countdown/soup
  soup-verl show runs/countdown/soup --step 10 --count 5 --all
  soup-verl show runs/smollm2/soup --brief --match '^.*= \d+$' --svg samples.svg
"""
FORM = {
    "step": int,
    "input": str,
    "marked": str,
    "score": NUMBER,
    "policy_versions": list,
    "prefix_length": int,
}
KIND = "the samples of our trainer, which tell their prefixes"
HISTORY = "black on yellow"
TOOL = "black on cyan"
SHOWN = "black on green"
STYLES = {OPEN: HISTORY, TOOL_OPEN: TOOL, SHOWN_OPEN: SHOWN}
TURNS = ("", "bold magenta")
"""Of what the current policy wrote, one turn after the other."""
WIDTH = 80
"""Width of a picture, in characters."""
TURN = re.compile(r"(?:^|\n)(?:system|user|assistant)\n")
"""What separates the turns of a chat when the special tokens are left out."""
FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)
STRETCHES = re.compile(f"({OPEN}.*?{CLOSE}|{TOOL_OPEN}.*?{TOOL_CLOSE}|{SHOWN_OPEN}.*?{SHOWN_CLOSE})", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl show`."""
    parser.add_argument("run", type=Path, help="folder of a run, or of its samples (trainer.rollout_data_dir)")
    parser.add_argument("--count", type=int, default=20, help="samples to show (default 20)")
    parser.add_argument("--step", type=int, help="of this step only (default: newest first)")
    parser.add_argument("--all", action="store_true", help="also those without a prefix")
    parser.add_argument("--match", metavar="REGEX", help="only responses in which it is found, ⟦history⟧ in brackets")
    parser.add_argument("--brief", action="store_true", help="of a chat only the last question, and no empty lines")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw what would be printed")


def last_question(prompt: str) -> str:
    """Return the last turn of a chat that is not empty, on a line of its own; without turns, the prompt."""
    turns = [turn.strip() for turn in TURN.split(prompt) if turn.strip()]
    return f"{turns[-1]}\n" if len(turns) > 1 else prompt


def coloured(sample: dict[str, Any], brackets: bool, brief: bool = False) -> Text:
    """Write one sample: step, reward, versions, prompt and response, in which stands out what the policy did not write.

    Args:
        brackets: keep those around history, tools and demonstrations, where there are no colours.
        brief: of a chat only the last question, and of the response no empty lines.
    """
    sampled = sample.get("response_mask", [1] * len(sample["policy_versions"]))  # all, in runs without tools
    versions = sorted({version for version, mine in zip(sample["policy_versions"], sampled, strict=True) if mine})
    turns = sum(mine for mine, _ in groupby(sampled))
    reward = sample["score"]
    text = Text().append(f"step {sample['step']}  ", style="dim")
    text.append(f"reward {reward:g}", style="bold green" if reward > 0 else "red")
    several = f"  turns {turns}" if turns > 1 else ""
    written = f"versions {', '.join(map(str, versions))}" if versions else "a demonstration"
    text.append(f"  {written}{several}\n", style="dim")
    prompt, response = printable(sample["input"]), printable(sample["marked"])
    text.append(last_question(prompt) if brief else prompt, style="cyan")
    response = re.sub(r"\n+", "\n", response).strip("\n") if brief else response
    styles = cycle(TURNS)
    style = next(styles)
    for i, piece in enumerate(STRETCHES.split(response)):
        if i % 2 == 0:
            text.append(piece, style=style)
            continue
        kind = STYLES[piece[0]]
        text.append(piece if brackets else piece[1:-1], style=kind)
        if kind == TOOL:
            style = next(styles)
    return text.append("\n")


def legend(brackets: bool) -> Text:
    """Which colour, or which brackets, is what."""
    text = Text()
    for name, before, after, style in (
        ("history", OPEN, CLOSE, HISTORY),
        (" the present ", "", "", ""),
        ("tools", TOOL_OPEN, TOOL_CLOSE, TOOL),
        (" ", "", "", ""),
        ("demonstrations", SHOWN_OPEN, SHOWN_CLOSE, SHOWN),
    ):
        text.append(f"{before}{name}{after}" if brackets else name, style=style)
    return text.append("\n")


def show(args: argparse.Namespace) -> None:
    """Print or draw training samples, newest first: history on yellow, then what the current policy wrote.

    Between two turns stands what a tool answered, on cyan; the current policy's turns take turns in their colours. What
    is of a demonstration is on green.
    """
    folder = args.run / "samples" if (args.run / "samples").is_dir() else args.run
    found = {step: path for step, path in dumps(folder).items() if args.step in (None, step)}
    if not found:
        what = "no samples" if args.step is None else f"no samples of step {args.step}"
        raise refuse("run", args.run, f"{what} there; a run writes them with trainer.rollout_data_dir=FOLDER.")
    if args.count < 1:
        raise refuse("--count", args.count, "give 1 or more.")
    if args.svg:
        check_file("--svg", args.svg)
    drawn = {"record": True, "file": io.StringIO(), "width": WIDTH} if args.svg else {}
    try:
        matches = re.compile(args.match or "").search
    except re.error as error:
        raise refuse("--match", args.match, f"no regular expression ({error}).") from None
    console = Console(highlight=False, **drawn)
    brackets = console.color_system is None  # a pipe, or a terminal without colours, or a picture
    console.print(legend(brackets))
    left = args.count
    # Sorted by time: a run that starts anew leaves the later steps of the one before.
    newest_first = sorted(found, key=lambda step: (found[step].stat().st_mtime, step), reverse=True)
    for step in newest_first:
        for sample in read_json_lines(found[step], FORM, KIND):
            mask = sample.get("response_mask")
            if mask is not None and not (isinstance(mask, list) and len(mask) == len(sample["policy_versions"])):
                raise refuse("file", found[step], "a sample's `response_mask` has not one value for each token.")
            given = sample["prefix_length"] or sample.get("demonstration_length", 0)
            if left and (args.all or given) and matches(sample["marked"]):
                console.print(coloured(sample, brackets, args.brief))
                left -= 1
        if not left:
            break
    if left == args.count and not args.all:
        what = f" and {args.match}" if args.match else ""
        console.print(f"No sample here has a prefix{what}; --all shows the others.", markup=False)
    elif left == args.count:
        console.print(f"No sample here has {args.match}." if args.match else "No sample here.", markup=False)
    if args.svg:
        # Without the fonts that it would fetch: any of fixed width does.
        args.svg.write_text(FONT.sub("", console.export_svg(title="soup-verl show")), encoding="utf-8")
        print(args.svg)
