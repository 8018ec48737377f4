"""From a front to what ships, with proof."""
