"""What a step costs: bytes, seconds and dollars. Pure arithmetic over a workload and the catalogue of hardware."""
