"""From prompts to a value head: collect and label generations, train on them."""
