"""Models of the Hugging Face hub as files on this machine. Imported by every floor from `plan` up; imports none.

`cache` knows where they lie, `client` asks the hub, `snapshot` brings what is missing from there to here, `upload`
what was trained to there.
"""
