"""``dapt serve``: a tuned classifier behind HTTP, and a page to drop photos on.

served.py    the classifier and its support images: views in, answers out
batching.py  one thread that owns the model, and what is waiting for it
uploads.py   what a request may send, and how it is read
app.py       the routes
gate.py      what every request passes: host, token, headers, metrics
server.py    the socket, signals, clients that are slow
static/      the pages
"""
