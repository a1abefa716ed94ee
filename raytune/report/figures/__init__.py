"""Figures of a sweep, drawn with matplotlib. Values in, figures out; no pyplot, hence no state that two threads could share.

Colours stay apart for colour-blind readers and in grey: a ramp of one hue says how far a trial came, the winner is orange and
thick, failures are crosses. Text is drawn as it is: a value such as "$x$" is no formula. `canvas` has what all of them share,
each other file is a figure or two.
"""
