"""What is drawn. Each widget takes plain values, sends messages, and knows no machine."""
