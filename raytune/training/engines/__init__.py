"""Engines behind one protocol: whole weights on every rank, or DeepSpeed's shards; what they update with."""
