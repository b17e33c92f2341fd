"""argv -> config -> one call. No logic lives here."""
