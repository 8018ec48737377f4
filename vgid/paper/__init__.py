"""The paper's tables and claims, and the fair comparison of methods."""
