"""The watch over engines at work: health checks, and the verdicts that follow from them."""
