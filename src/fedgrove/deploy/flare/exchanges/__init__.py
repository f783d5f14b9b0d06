"""What a site itself is asked, before and after the stages: to join, to take the result, to clear its working files."""
