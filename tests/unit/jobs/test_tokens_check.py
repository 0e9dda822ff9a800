import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.jobs.test_tokens import pictures

from qlip.data.token_file import TokenFiles, TokenFormat, write_token_file
from qlip.errors import InputError
from qlip.eval.reconstruction import code_use
from qlip.files import checksum
from qlip.jobs.tokens import tokenize
from qlip.jobs.tokens_check import stats, verify


@pytest.fixture
def tokens(job, tmp_path):
    return tokenize(replace(job, sources=(pictures(tmp_path / "in", 5),), shard_rows=2)).files[0].parent


def reasons(folder):
    return {Path(fault["key"]).name: fault["reason"] for fault in verify(folder)["broken"]}


def test_what_was_written_is_whole(tokens):
    assert verify(tokens) == {"num_shards": 3, "num_rows": 5, "num_failures": 0, "broken": []}


def test_every_fault_is_named(tokens, tmp_path):
    bad = tokens / "tokens-00001.parquet"
    good = bad.read_bytes()
    bad.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    shutil.copy(tokens / "tokens-00002.parquet", tokens / "tokens-00009.parquet")
    (tokens / "tokens-00002.parquet").unlink()
    found = reasons(tokens)
    assert "its bytes are not those that the manifest names" in found.pop(bad.name)
    assert found == {
        "tokens-00002.parquet": "is missing, but in the manifest",
        "tokens-00009.parquet": "is not in the manifest",
    }


@pytest.mark.parametrize(
    ("rows", "changes", "reason"),
    [
        (2, {"id_hash": "f" * 16}, "holds ids ffff"),
        (1, {}, "has 1 rows, the manifest says 2"),
        (2, {"bits": 3}, "has ids of more than 3 bits"),
    ],
)
def test_files_that_a_manifest_was_made_for_by_mistake(tokens, rows, changes, reason):
    file, path = tokens / "tokens-00000.parquet", tokens / "_manifest.json"
    token_format = replace(TokenFormat.read(file), **changes)
    write_token_file(file, token_format, ["a", "b"][:rows], np.full((rows, 16), 9))
    manifest = json.loads(path.read_text())
    manifest["sha256"][file.name] = checksum(file)
    path.write_text(json.dumps(manifest))
    assert reason in reasons(tokens)[file.name]


def test_without_a_manifest_nothing_can_be_compared(tokens):
    (tokens / "_manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no _manifest\.json of tokens: start its `qlip tokenize` again"):
        verify(tokens)


def test_one_file_is_read_and_its_sum_compared(job, tmp_path):
    done = tokenize(replace(job, sources=(pictures(tmp_path / "in", 3),), out=tmp_path / "t.parquet"))
    assert verify(done.files[0]) == {"num_shards": 1, "num_rows": 3, "num_failures": 0, "broken": []}
    contents = bytearray(done.files[0].read_bytes())
    contents[contents.index(b"parquet-cpp")] ^= 1  # what no reader looks at
    done.files[0].write_bytes(contents)
    assert "its bytes are not those" in verify(done.files[0])["broken"][0]["reason"]


def test_a_lost_shard_is_a_fault(tokens):
    path = tokens / "_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["lost"] = [{"key": "https://host/7.tar", "reason": "cannot be read", "index": None, "is_file": True}]
    path.write_text(json.dumps(manifest))
    assert reasons(tokens) == {"7.tar": "is not tokenized: cannot be read"}


def test_stats_are_those_of_plain_numpy(tokens):
    found = stats([tokens], group_bits=4)
    ids = np.concatenate([ids for _, ids in TokenFiles.open([tokens]).batches()]).astype(np.int64)
    use = code_use(torch.from_numpy(ids), 28)
    assert sum(found["bit_entropy"]) == pytest.approx(use["bit_entropy"], abs=1e-4)
    assert found["distinct_tokens"] == len(np.unique(ids)) and found["num_tokens"] == ids.size == 80
    assert found["codes_used"] == len(np.unique(ids)) / 2**28
    bits = (ids.reshape(-1, 1) >> np.arange(27, -1, -1)) & 1
    assert found["bit_ones"] == pytest.approx(bits.mean(0))
    for i, entropy in enumerate(found["group_entropy"]):
        _, counts = np.unique(bits[:, 4 * i : 4 * i + 4], axis=0, return_counts=True)
        shares = counts / counts.sum()
        assert entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    varied = np.flatnonzero(bits.std(0))
    matrix = np.abs(np.corrcoef(bits[:, varied].T)[np.triu_indices(len(varied), 1)])
    assert found["correlation"]["mean"] == pytest.approx(matrix.mean())
    assert abs(found["correlation"]["largest"][0]["value"]) == pytest.approx(matrix.max())


def test_stats_of_known_ids(tmp_path):
    """Bits 1 and 2 are always the same, bits 3 and 4 the opposite; two rows repeat."""
    ids = np.array([[0b0001, 0b1101], [0b0010, 0b1110], [0b0001, 0b1101]])
    write_token_file(tmp_path / "a.parquet", TokenFormat("a", "0" * 16, 4, (1, 2)), ["a", "b", "c"], ids)
    write_token_file(tmp_path / "b.parquet", TokenFormat("a", "0" * 16, 4, (1, 2)), ["d"], ids[:1])
    found = stats([tmp_path], group_bits=2)
    assert found["duplicates"] == [["a", "c", "d"]] and found["num_duplicates"] == 2 and found["num_rows"] == 4
    assert found["bit_entropy"][:2] == [1, 1] and found["group_entropy"][0] == 1
    pairs = {(p["first"], p["second"]): p["value"] for p in found["correlation"]["largest"]}
    assert pairs[0, 1] == pytest.approx(1) and pairs[2, 3] == pytest.approx(-1) and pairs[0, 2] == pytest.approx(0)
    assert found["distinct_tokens"] == 4 and found["codes_used"] == 0.25
    with pytest.raises(InputError, match=r"group_bits=3 does not divide .*\[1, 2, 4\]"):
        stats([tmp_path], group_bits=3)


def test_ids_of_63_bits_and_constant_ones(tmp_path):
    ids = np.full((2, 2), 2**63 - 1, np.uint64)
    write_token_file(tmp_path / "a.parquet", TokenFormat("a", "0" * 16, 63, (1, 2)), ["a", "b"], ids)
    found = stats([tmp_path])
    assert found["group_bits"] == 9 and found["distinct_tokens"] == 1 and sum(found["bit_entropy"]) == 0
    assert found["correlation"] == {"mean": 0.0, "largest": []} and found["bit_ones"] == [1.0] * 63


def test_stats_of_ids_that_no_tokenizer_makes_and_of_rows_without_keys(tmp_path):
    of = TokenFormat("a", "0" * 16, 4, (1, 2))
    write_token_file(tmp_path / "wide.parquet", of, ["a"], np.array([[1, 16]]))
    with pytest.raises(InputError, match="more than the 4 bits of its tokenizer"):
        stats([tmp_path / "wide.parquet"])
    write_token_file(tmp_path / "keyless.parquet", of, [None, None], np.array([[1, 2], [1, 2]]))
    assert stats([tmp_path / "keyless.parquet"])["duplicates"] == [["(no key)", "(no key)"]]


def test_a_file_that_is_deleted_while_the_job_runs_is_missed(job, tmp_path):
    def deleting(batches):
        for batch in batches:
            (job.out / "tokens-00000.parquet").unlink(missing_ok=True)
            yield batch

    job = replace(job, sources=(pictures(tmp_path / "in", 6),), shard_rows=2)
    with pytest.raises(InputError, match=r"tokens-00000\.parquet was deleted while the job ran: start it again"):
        tokenize(job, deleting)
    assert not (job.out / "_manifest.json").exists()
    assert tokenize(job).num_rows == 6 and not verify(job.out)["broken"]
