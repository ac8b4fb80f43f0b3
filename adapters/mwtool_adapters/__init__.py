"""mwtool's own adapters, one module a family, registered as any third party's would be."""
