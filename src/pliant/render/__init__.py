"""Reports as text: for the terminal, as Markdown, and as one HTML file with figures."""
