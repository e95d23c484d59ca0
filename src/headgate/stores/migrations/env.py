"""Runs the migrations on the connection and inside the transaction that `stores.database` opened."""

from alembic import context

from headgate.stores.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
