"""The short version of benchmarks/kill_resume.py: real processes, real SIGKILLs, a real S3 server."""

from benchmarks.kill_resume import campaign


def test_killed_at_random_moments_and_resumed_from_the_bucket_alone(tmp_path):
    outcomes = campaign(runs=2, processes=1, seed=1, scratch=tmp_path)
    assert all(outcome.right for outcome in outcomes), outcomes
    assert sum(outcome.kills for outcome in outcomes) >= 2
