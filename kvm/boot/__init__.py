"""One loader a guest format."""
