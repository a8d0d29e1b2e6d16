"""What is known of the nodes: who they are, how they are, how fast they are."""
