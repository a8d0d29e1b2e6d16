"""Plain HTTP/1.1 without mitmproxy's layers: a request is one coroutine, a body goes from socket to socket.

mitmproxy's layers cost a small request 1 ms of CPU and a piece of a stream 80 µs. The lane runs the same
hooks on the same flows. It takes only what its strict parsers know for certain; a connection that brings
anything else is handed to mitmproxy's layers, with every byte that has come.

    front.py     listens, and takes a client's connection or hands it over
    client.py    a client's connection: heads, bodies, limits on slow and many clients
    exchange.py  one request and its answer, from the first hook to the last
    node_side.py its connection to a node           upload.py  its body, where that is too large to hold
    upstream.py  a connection to a node             pool.py    those that wait for their next request
    splice.py    a body on its way to the client, followed but not parsed
    inflow.py    reading on either side: paused, or a large piece in each turn of the loop
    head.py, framing.py  the parsers, pure
"""
