import nonexistent_module  # noqa: F401 what a reward function's file must not do
