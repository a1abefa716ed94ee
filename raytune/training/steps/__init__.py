"""The loop and what is decided between its steps: schedules, records, requests, divergence, ends."""
