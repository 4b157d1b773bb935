"""What is measured on a GPU: pieces that run one by one, and the page that compares them to the targets."""
