"""Where clips come from: a small world that can be drawn, and folders of videos and images."""
