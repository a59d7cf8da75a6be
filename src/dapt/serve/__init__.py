"""``dapt serve``: a tuned classifier behind HTTP, and a page to drop photos on.

served.py  the classifier and its support images: views in, answers out
decoders.py, decoder.py  pictures of strangers to views, in processes that can be ended
app.py     what a request may send, one thread that owns the model, and the routes
bodies.py  images of a request that is no form: base64 in JSON, or one as it is
workers.py several processes at one address
server.py  the socket, signals, slow clients, and what every request passes: host, token, metrics
static/    the pages
"""
