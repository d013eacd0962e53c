"""The linter's rules by topic, and beside them a page for each code (`CODE.md`). `lint.py` collects them."""
