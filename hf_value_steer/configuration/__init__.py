"""The configurations, one a file, and how the `value_steer` argument is read."""
