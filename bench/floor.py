"""The least that FastAPI can do: a route that returns a constant. Its CPU time is our unit."""

from fastapi import FastAPI, Response

app = FastAPI()


@app.get("/")
async def constant() -> Response:
    return Response(b'{"status": "ok"}', media_type="application/json")
