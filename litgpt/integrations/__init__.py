"""Our adapters in other libraries' models."""
