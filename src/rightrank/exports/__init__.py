"""Files for servers and other trainers, written from a finished adapter. Nothing here trains; reading them back belongs to `adapters`."""
