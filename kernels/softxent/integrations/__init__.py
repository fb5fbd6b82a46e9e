"""The loss where other libraries look for it, one module a library. None is imported by `import softxent`."""
