"""What this library takes for granted of the packages that it runs in, in one place for each of them."""
