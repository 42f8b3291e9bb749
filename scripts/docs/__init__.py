"""The documentation site: pages that code writes, and the hook of mkdocs."""
