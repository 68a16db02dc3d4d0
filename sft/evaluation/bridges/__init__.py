"""Models of this toolkit as other harnesses take them: lmms_eval, which finds it by an entry point of the package."""
