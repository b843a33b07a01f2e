"""Where units of work run: in this process, as one shard of several, or on a Ray cluster - over one store of finished units."""
