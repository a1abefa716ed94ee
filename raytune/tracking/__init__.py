"""What happens in a run, told to experiment trackers: beside it, and never in its way.

A command that trains starts a process for each tracker (`watching`), which reads the run folder as anybody could (`process`,
`follow`) and is killed where it hangs. What a tracker was told is noted in the run folder, so that a later command goes on
there. Each library has one file, which fulfils `tracker.Tracker`; `trackers` is their table.
"""
