"""Tests of pgpipeline. They need a PostgreSQL: the fixture `postgres` gives its address."""
