"""What no field can refuse by itself: keys that nothing reads, settings that do not go together, spaces of sweeps."""
