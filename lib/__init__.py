"""Machinery of an HTTP service on PostgreSQL. It knows tasks by examples only.

What a request passes, from the outside in:

    serve        starts uvicorn; its flags
    protocol     uvicorn's HTTP protocol, with bounds
    readers      clients that are slow to read, and who is dropped
    middleware   the client's address, the log, errors, bodies
    cors         which web pages may call the service
    paths        one form for each path
    schemas      parts of schemas, and the schemas of accounts
    routing      routes without FastAPI's work for each request
    state        what is known of a request: RequestState, by state_of(scope)
    headers      what routes take from headers: conditions, Idempotency-Key; Link
    problems     errors as JSON (RFC 9457)
    logs         lines of JSON on standard output
    telemetry    OpenTelemetry, where it is set up

Identity:

    tokens       JWTs: the signature, and what the claims say
    jwks         an issuer's public keys
    passwords    hashes by bcrypt
    ratelimit    limits in a window of time

The start, and documents:

    settings     settings from the environment and .env
    startup      the lifespan of the process
    database_url DATABASE_URL as people have it
    prepare      applies the schema, in attempts until a deadline
    checks       what the start refuses in a database
    connect_errors which errors of a connection waiting cures
    openapi      completes FastAPI's document
    pages        Swagger UI and ReDoc without a CDN
    develop      `python main.py`, and the PostgreSQL that pip installs
"""
