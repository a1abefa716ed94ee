"""Models that are asked on the workers of a cluster: answers, scores, suites."""
