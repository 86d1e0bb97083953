"""Files in a checkpoint: whole or not there, and what is neither is said in a sentence."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from recipe.soup.prefixes.bank import FORMAT, PrefixBank, read_origin
from recipe.soup.prefixes.files import UnreadableError, read_arrays, write_arrays
from recipe.soup.prefixes.prefix import Prefix

ORIGIN = {"algorithm.soup.lag": 6, "algorithm.soup.source": "lookahead", "data.train_files": ["3 bytes"]}


def filled() -> PrefixBank:
    bank = PrefixBank()
    for prompt in range(50):
        ids, log_probs = np.arange(20, dtype=np.int32), -np.ones(20, dtype=np.float32)
        bank.put(prompt, 0, Prefix(ids, log_probs, ((3, 20),)))
    return bank


def test_a_run_that_is_killed_while_it_writes_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.npz"
    filled().save(path, ORIGIN, 7, {})
    before = path.read_bytes()

    def killed(file: object, **arrays: object) -> None:
        file.write(b"half")  # pyright: ignore[reportAttributeAccessIssue]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        filled().save(path, {}, 8, {})
    assert path.read_bytes() == before


def test_a_file_gets_the_name_that_it_was_given_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x.npz", a=np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with read_arrays(tmp_path / "x.npz") as arrays:
        assert arrays["a"].tolist() == [0, 1, 2]


def test_what_shaped_a_bank_is_read_without_its_prefixes(tmp_path: Path) -> None:
    filled().save(tmp_path / "bank.npz", ORIGIN, 7, {})
    assert read_origin(tmp_path / "bank.npz") == ORIGIN


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_bank_is_said_to_be_torn(tmp_path: Path, share: float) -> None:
    path = tmp_path / "bank.npz"
    filled().save(path, ORIGIN, 7, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_origin, PrefixBank.load):
        with pytest.raises(UnreadableError, match=r"^bank\.npz is torn, or no file of arrays$"):
            read(path)


def test_a_bank_of_which_a_byte_has_changed_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    filled().save(path, ORIGIN, 7, {})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        content[parts.getinfo("token_ids.npy").header_offset + 300] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(UnreadableError, match=r"^bank\.npz cannot be read \("):
        PrefixBank.load(path)


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    shapes = {"table": [[0, 0, 0, 99, 1]], "runs": [[0, 99]], "token_ids": [1], "log_probs": [0.0]}
    for content in (
        {"weights": np.zeros(3)},
        {"table": [[1, 2]]},
        {"next_ordinal": 0, "fingerprints": np.zeros((0, 2), int), **shapes},
    ):
        write_arrays(path, **content)
        with pytest.raises(UnreadableError):
            PrefixBank.load(path)
    write_arrays(path, origin="{", format=FORMAT)
    with pytest.raises(UnreadableError):
        read_origin(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(UnreadableError):
        read_origin(path)
    with pytest.raises(UnreadableError, match="No such file"):
        read_origin(tmp_path / "nothing.npz")


def test_older_and_newer_ones(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    write_arrays(path, source="lookahead", next_ordinal=0)
    with pytest.raises(UnreadableError, match="was written before it said what shaped its prefixes"):
        read_origin(path)
    write_arrays(path, origin="{}", format=FORMAT + 1)
    with pytest.raises(UnreadableError, match=f"has the format {FORMAT + 1}, and this version reads up to {FORMAT}"):
        read_origin(path)
