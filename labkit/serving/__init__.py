"""The engine over HTTP. A call passes these files in this order, and none calls back:

1. `asgi` limits the body, and notices a client that goes away.
2. `routes` parse and respond.
3. `schema` turns a body into prompts and `SamplingParams`; `errors` says what is refused.
4. `handler` lets the call in and follows its answers to the end.
5. `async_engine` runs the engine on a thread; `answer` is what it publishes.
6. `stream` writes whole answers, and pieces of them as server-sent events.

`metrics` counts the steps that the engine's thread reports, and `limits` are those of the web page, too.
`server`, `scale` (with `ray_replica`) and `export` are programs; `cli` has their common options.
"""
