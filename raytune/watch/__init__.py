"""What goes on under a storage folder, while it does: looks, rows, a screen in a terminal and a page in a browser.

`look` reads folders and is the only one that does; `rows` makes of what was read what a person is shown; `screen` and `terminal`
show it in a terminal, `server` to a browser. Whatever is asked of a run goes through files in its folder (`asking`).
"""
