"""What servers do with an adapter.

served.py    an adapter and its base as a server meets them
linter.py    what servers will choke on, and what to do
commands.py  the commands that serve it
"""
