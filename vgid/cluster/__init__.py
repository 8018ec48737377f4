"""Ray: the slots that trials run in, what they take, and how they are talked to."""
