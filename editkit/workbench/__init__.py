"""The workbench: trace, choose, edit, look, undo, in a browser. `python -m editkit.workbench`.

    recipe.py   a stack of edits with strengths, and how each was computed: as JSON, as Python, as a command
    messages.py what a page may ask for: every field checked
    bench.py    what all tabs share: the model, always at rest as it was loaded, its atlas answers, its alarm, files
    looks.py    what the model says with and without an edit, and what was predicted
    where.py    causal trace and logit lens of a prompt, as a page draws them
    desk.py     one tab: its stack and its draft. Turns a message into calls of the public functions; knows no HTTP
    leaving.py  files of a stack, the texts that make it again, and a stack made from such a text
    history.py  a stack over time: undo and redo
    handlers.py what a page can ask for, by name
    page.py     the tab's state as one HTML page
    worker.py   one thread, one job at a time; the others wait and are told; any can be stopped
    guard.py    who may connect: host, origin, token
    server.py   pages, socket, downloads
    static/     the page: HTML, CSS and JavaScript modules, no build step

No editing logic lives here: what a notebook calls is called.
"""
