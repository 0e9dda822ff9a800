"""What the tests of tokens share."""

import pytest

from qlip.jobs.tokens_job import Job


@pytest.fixture
def job(small_model, tmp_path):
    """Of the random model; the rest is for a test to replace."""
    small_model.save(tmp_path / "small")
    return Job(str(tmp_path / "small"), (), tmp_path / "tokens", batch_size=2, num_workers=0, device="cpu")
