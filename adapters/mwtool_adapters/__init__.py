"""The adapters that come with mwtool, one module per family, registered through entry points as plugins are."""
