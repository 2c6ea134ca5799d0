"""Looking at what steering did: pages of generations with the value of every token."""
