"""The short version of benchmarks/kill_resume.py: real processes, real SIGKILLs, a real S3 server."""

from benchmarks.kill_resume import campaign


def test_killed_at_random_moments_and_resumed_from_the_bucket_alone(tmp_path):
    (outcome,) = campaign(runs=1, processes=1, seed=370, scratch=tmp_path)
    assert outcome.right, outcome
    assert outcome.kills == 2
